var moves = __MOVES__;
function process(event) {
  event.Put("event.module", "tsproxy");
  event.Put("service.name", "tsproxy");
  event.Put("ecs.version", "__ECS_VERSION__");
  var name = event.Get("tsproxy.event");
  if (!name) {
    event.Put("event.kind", "pipeline_error");
    return;
  }
  event.Delete("message");
  event.Put("event.kind", name == "metrics" ? "metric" : "event");
  event.Put("event.action", name);
  event.Put("event.dataset", "tsproxy." + name);
  if (name == "connection") {
    event.Put("event.category", ["network"]);
    event.Put("event.type", ["connection", "end"]);
    event.Put("network.transport", "tcp");
    event.Put("network.bytes", event.Get("tsproxy.rx_bytes") + event.Get("tsproxy.tx_bytes"));
  }
  event.Delete("tsproxy.event");
  for (var i = 0; i < moves.length; i++) {
    var value = event.Get("tsproxy." + moves[i][0]);
    if (value !== null && value !== undefined) {
      for (var j = 0; j < moves[i][1].length; j++) {
        event.Put(moves[i][1][j], moves[i][2] == 1 ? value : value * moves[i][2]);
      }
    }
    event.Delete("tsproxy." + moves[i][0]);
  }
}

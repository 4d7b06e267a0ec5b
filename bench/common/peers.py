"""Other relays, as their own manuals say to set them up for plain TCP; used only where they are installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Callable, List, Mapping, Optional

# (directory for files, port to listen on, target port, threads or processes) -> the command
Command = Callable[[Path, int, int, int], List[str]]

_MODULES = ("/usr/lib/nginx/modules", "/usr/lib64/nginx/modules", "/usr/share/nginx/modules", "/usr/local/lib/nginx/modules")


def haproxy(directory: Path, port: int, target: int, workers: int) -> List[str]:
    """Mode tcp with splicing where it helps."""
    config = directory / "haproxy.cfg"
    config.write_text(
        f"global\n  maxconn 4000\n  nbthread {workers}\n"
        "defaults\n  mode tcp\n  option splice-auto\n"
        "  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n"
        f"listen relay\n  bind 127.0.0.1:{port}\n  server far 127.0.0.1:{target}\n"
    )
    return ["haproxy", "-q", "-f", str(config)]


def nginx(directory: Path, port: int, target: int, workers: int) -> List[str]:
    """Its stream module, with a buffer as large as tsproxy's."""
    config = directory / "nginx.conf"
    master = f"worker_processes {workers};" if workers > 1 else "master_process off;"
    config.write_text(
        f"{_stream_module() or ''}\ndaemon off; {master}\n"
        f"pid {directory}/nginx.pid; error_log {directory}/nginx.log;\n"
        "events { worker_connections 10000; }\n"
        "stream { server {\n"
        f"  listen 127.0.0.1:{port}{' reuseport' if workers > 1 else ''}; proxy_pass 127.0.0.1:{target};\n"
        "  proxy_buffer_size 64k;\n} }\n"
    )
    return ["nginx", "-c", str(config)]


def socat(directory: Path, port: int, target: int, workers: int) -> List[str]:
    """A process for each connection; its buffer as large as tsproxy's."""
    listen = f"TCP4-LISTEN:{port},bind=127.0.0.1,fork,reuseaddr,nodelay,backlog=4096"
    return ["socat", "-b65536", listen, f"TCP4:127.0.0.1:{target},nodelay"]


def _stream_module() -> Optional[str]:
    """The line that loads it; empty if it is built in; None if nginx has none."""
    for place in _MODULES:
        module = Path(place, "ngx_stream_module.so")
        if module.exists():
            return f"load_module {module};"
    told = subprocess.run(["nginx", "-V"], capture_output=True, text=True, check=False).stderr.split()
    return "" if "--with-stream" in told else None


COMMANDS: Mapping[str, Command] = {"haproxy": haproxy, "nginx": nginx, "socat": socat}


def installed() -> Mapping[str, Command]:
    """Name -> how to start it."""
    found = {name: make for name, make in COMMANDS.items() if shutil.which(name)}
    if "nginx" in found and _stream_module() is None:
        del found["nginx"]
    return found

"""`generate kubernetes`: a Deployment whose pods have the sysctl off, its disruption budget, a Service."""

from __future__ import annotations

import json
import math
import pwd

from _tsproxy.cli import exits
from _tsproxy.cli.config import Config, usable_cpus
from _tsproxy.cli.exits import Exit
from _tsproxy.tools.generate.docker import IMAGE, words_inside
from _tsproxy.tools.generate.text import command, fill, targets

_NOBODY = 65534
_GONE_S = 5  # until no node sends new clients any more
_GRACE_S = 10  # beyond that and the drain, for the last lines
_MIB = 1 << 20
_PYTHON_MIB = 128
_KERNEL_BYTES = 512 << 10  # socket buffers of a busy connection, which count as the pod's

_MANIFEST = """\
# tsproxy @VERSION@ in Kubernetes: pods whose net.ipv4.tcp_timestamps is 0, IPv4 and IPv6, behind one Service.
# Asked for: @TARGETS@.
#
# First:  this sysctl is one that Kubernetes calls unsafe (it is the pod's own, and harmless to others). On the nodes the
#         kubelet has to be told --allowed-unsafe-sysctls=net.ipv4.tcp_timestamps (allowedUnsafeSysctls in its
#         configuration), or pods end as SysctlForbidden; and the namespace needs the label
#         pod-security.kubernetes.io/enforce=privileged where Pod Security is enforced.
# Make:   tsproxy.py bundle tsproxy
#         kubectl create configmap tsproxy --from-file=tsproxy --dry-run=client -o yaml | kubectl apply --server-side -f -
#         @COMMAND@ | kubectl apply -f -
#         As often as you like. After a new bundle: kubectl rollout restart deployment/tsproxy
# Undo:   @COMMAND@ | kubectl delete -f -
#         kubectl delete configmap tsproxy
# Look:   kubectl logs -l app.kubernetes.io/name=tsproxy -f --prefix
---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: tsproxy
  labels:
    app.kubernetes.io/name: tsproxy
    app.kubernetes.io/version: "@VERSION@"
spec:
  replicas: 3
  selector:
    matchLabels:
      app.kubernetes.io/name: tsproxy
  strategy:
    rollingUpdate:
      maxSurge: 1
      maxUnavailable: 0
  template:
    metadata:
      labels:
        app.kubernetes.io/name: tsproxy
        app.kubernetes.io/version: "@VERSION@"
    spec:
      # The point of it all. Not with hostNetwork, where it would be the node's.
      securityContext:
        sysctls:
          - name: net.ipv4.tcp_timestamps
            value: "0"
        runAsNonRoot: true
        runAsUser: @UID@
        runAsGroup: @GID@
        seccompProfile:
          type: RuntimeDefault
      automountServiceAccountToken: false
      enableServiceLinks: false
      # @GONE_S@ s until no client is sent here, the drain timeout, and a little more.
      terminationGracePeriodSeconds: @STOP_S@
      topologySpreadConstraints:
        - maxSkew: 1
          topologyKey: kubernetes.io/hostname
          whenUnsatisfiable: ScheduleAnyway
          labelSelector:
            matchLabels:
              app.kubernetes.io/name: tsproxy
      containers:
        - name: tsproxy
          image: @IMAGE@
          command: ["/usr/local/bin/python3", "-I", "-S", "/opt/tsproxy/tsproxy"]
          args:
@ARGUMENTS@
          ports:
            - name: relay
              containerPort: @PORT@
          securityContext:
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            capabilities:
              drop: [ALL]
          # A worker for each CPU of the node, unless there is --workers=N, which asks for N here too. Memory: Python, and
          # for each of --max-connections two relay buffers and the kernel's.
          resources:
            requests:
              cpu: "@CPUS@"
              memory: @PYTHON_MIB@Mi
            limits:
              memory: @MEMORY_MIB@Mi
          # The probes look at the pod's own kernel. One that connected (tcpSocket) would make tsproxy connect to the
          # exchange each time. tsproxy listens (0A) once its policy holds, and until it drains.
          startupProbe:
            exec:
              command: ["grep", "-qsE", ":@PORT_HEX@ [0-9A-F]+:0000 0A ", "/proc/net/tcp", "/proc/net/tcp6"]
            periodSeconds: 1
            failureThreshold: 30
          livenessProbe:
            exec:
              command: ["grep", "-qsE", ":@PORT_HEX@ [0-9A-F]+:0000 0A ", "/proc/net/tcp", "/proc/net/tcp6"]
            periodSeconds: 10
            failureThreshold: 3
          # Ready only while timestamps are off as well: tsproxy refuses new clients when they are not.
          readinessProbe:
            exec:
              command:
                - sh
                - -c
                - grep -qx 0 /proc/sys/net/ipv4/tcp_timestamps &&
                  grep -qsE ':@PORT_HEX@ [0-9A-F]+:0000 0A ' /proc/net/tcp /proc/net/tcp6
            periodSeconds: 5
            failureThreshold: 1
          lifecycle:
            preStop:
              exec:
                command: ["sleep", "@GONE_S@"]
          volumeMounts:
            - name: program
              mountPath: /opt/tsproxy
              readOnly: true
      volumes:
        - name: program
          configMap:
            name: tsproxy
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: tsproxy
spec:
  maxUnavailable: 1
  selector:
    matchLabels:
      app.kubernetes.io/name: tsproxy
---
apiVersion: v1
kind: Service
metadata:
  name: tsproxy
  labels:
    app.kubernetes.io/name: tsproxy
spec:
  selector:
    app.kubernetes.io/name: tsproxy
  ports:
    - name: relay
      port: @PORT@
      targetPort: relay
"""


def text(config: Config) -> str:
    """The manifest for `kubectl apply -f -`."""
    if config.sources:
        raise Exit(
            exits.USAGE,
            f"--source: given {config.sources[0]!r}; allowed with generate kubernetes: none (pods are given theirs)",
        )
    owner = _owner(config)
    per_connection = 2 * config.buffer_size + _KERNEL_BYTES
    return fill(
        _MANIFEST,
        COMMAND=command("kubernetes", config),
        TARGETS=targets(config),
        IMAGE=IMAGE,
        UID=owner[0],
        GID=owner[1],
        ARGUMENTS="\n".join(f"            - {json.dumps(word)}" for word in words_inside(config)),
        PORT=config.port,
        PORT_HEX=f"{config.port:04X}",
        CPUS=1 if config.workers == len(usable_cpus()) else config.workers,
        PYTHON_MIB=_PYTHON_MIB,
        MEMORY_MIB=_PYTHON_MIB + math.ceil(config.max_connections * per_connection / _MIB),
        GONE_S=_GONE_S,
        STOP_S=math.ceil(config.drain_timeout_s) + _GONE_S + _GRACE_S,
    )


def _owner(config: Config) -> tuple[int, int]:
    """User and group as numbers, which is all that runAsNonRoot takes: those of --user here, else nobody's."""
    if config.user is None:
        return _NOBODY, _NOBODY
    try:
        account = pwd.getpwnam(config.user)
    except KeyError:
        account = None
    if account is None or account.pw_uid == 0:
        allowed = "a user of this host but root (its number goes into the pods)"
        raise Exit(exits.USAGE, f"--user: given {config.user!r}; allowed with generate kubernetes: {allowed}")
    return account.pw_uid, account.pw_gid

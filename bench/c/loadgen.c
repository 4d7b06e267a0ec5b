/* Load for a TCP relay, all on loopback, bounded in time.
 *   loadgen echo | sink                      the far end: echoes, or reads and drops; prints its port first
 *   loadgen pp   PORT CONNS SIZE SECONDS     closed-loop ping-pong: round trips/s and latency
 *   loadgen bulk PORT MEGABYTES              one stream up; Gbit/s until the far end has it all
 *   loadgen conn PORT SECONDS                connect, one byte there and back, close; connections/s
 *   loadgen burst PORT CONNS SECONDS         the same with CONNS of them under way at any time
 * Prints one line of key=value. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static char buf[1 << 20];
static const int one = 1;

static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec * 1e-9; }
static void die(const char *what) { perror(what); exit(1); }
static int by_value(const void *a, const void *b) { double x = *(double *)a, y = *(double *)b; return (x > y) - (x < y); }

static struct sockaddr_in loopback(int port) {
  struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  return a;
}
static int dial(int port) {
  int s = socket(AF_INET, SOCK_STREAM, 0);
  struct sockaddr_in a = loopback(port);
  if (s < 0 || connect(s, (void *)&a, sizeof a)) die("connect");
  struct timeval timeout = {.tv_sec = 10};
  setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
  setsockopt(s, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout);
  return s;
}

static void serve(int echo) {
  int l = socket(AF_INET, SOCK_STREAM, 0), ep = epoll_create1(0);
  struct sockaddr_in a = loopback(0);
  socklen_t length = sizeof a;
  if (bind(l, (void *)&a, sizeof a) || listen(l, 4096) || getsockname(l, (void *)&a, &length)) die("bind");
  printf("port=%d\n", ntohs(a.sin_port));
  fflush(stdout);
  struct epoll_event e = {.events = EPOLLIN, .data.fd = l}, ev[256];
  epoll_ctl(ep, EPOLL_CTL_ADD, l, &e);
  for (;;) {
    int n = epoll_wait(ep, ev, 256, -1);
    for (int i = 0; i < n; i++) {
      int f = ev[i].data.fd;
      if (f == l) {
        int s = accept(l, 0, 0);
        if (s < 0) continue;
        setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        e.data.fd = s;
        epoll_ctl(ep, EPOLL_CTL_ADD, s, &e);
        continue;
      }
      ssize_t r = recv(f, buf, sizeof buf, MSG_DONTWAIT), o = 0;
      if (r < 0 && errno == EAGAIN) continue;
      if (r <= 0) { close(f); continue; }
      while (echo && o < r) { ssize_t w = send(f, buf + o, r - o, 0); if (w <= 0) break; o += w; }
    }
  }
}

static int ping_pong(int port, int conns, int size, double seconds) {
  int *s = malloc(conns * sizeof *s), *got = calloc(conns, sizeof *got), ep = epoll_create1(0);
  double *sent = malloc(conns * sizeof *sent), *lat = malloc(sizeof(double) * 8000000);
  long n = 0;
  for (int i = 0; i < conns; i++) {
    s[i] = dial(port);
    struct epoll_event e = {.events = EPOLLIN, .data.u32 = i};
    epoll_ctl(ep, EPOLL_CTL_ADD, s[i], &e);
  }
  double from = now() + 0.3, till = from + seconds;
  for (int i = 0; i < conns; i++) { sent[i] = now(); send(s[i], buf, size, 0); }
  struct epoll_event ev[256];
  for (;;) {
    int k = epoll_wait(ep, ev, 256, 1000);
    if (now() > till) break;
    for (int j = 0; j < k; j++) {
      int i = ev[j].data.u32;
      ssize_t r = recv(s[i], buf, sizeof buf, MSG_DONTWAIT);
      if (r == 0) { fprintf(stderr, "end of file\n"); return 1; }
      if (r < 0) continue;
      if ((got[i] += r) < size) continue;
      double t = now();
      if (t > from && n < 8000000) lat[n++] = t - sent[i];
      got[i] = 0; sent[i] = now(); send(s[i], buf, size, 0);
    }
  }
  if (!n) { fprintf(stderr, "no round trip\n"); return 1; }
  qsort(lat, n, sizeof *lat, by_value);
  printf("rate=%.0f p50=%.2f p99=%.2f p999=%.2f max=%.1f\n", n / seconds, lat[n / 2] * 1e6, lat[n * 99 / 100] * 1e6, lat[(long)(n * .999)] * 1e6, lat[n - 1] * 1e6);
  return 0;
}

static int bulk(int port, long megabytes) {
  int s = dial(port);
  double t = now();
  for (long left = megabytes << 20; left > 0;) {
    ssize_t w = send(s, buf, left < 262144 ? left : 262144, 0);
    if (w <= 0) die("send");
    left -= w;
  }
  shutdown(s, SHUT_WR);
  while (recv(s, buf, sizeof buf, 0) > 0) {}
  t = now() - t;
  printf("gbps=%.2f\n", megabytes * 8.388608e-3 / t);
  return 0;
}

static int connects(int port, double seconds) {
  long n = 0;
  double t = now();
  while (now() - t < seconds) {
    int s = dial(port);
    if (send(s, buf, 1, 0) != 1 || recv(s, buf, 1, 0) != 1) die("one byte");
    close(s);
    n++;
  }
  printf("rate=%.0f\n", n / (now() - t));
  return 0;
}

/* Connects without waiting, then one byte there and back, then close and the next one. */
static int begin(int port, int ep, int i) {
  int s = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  struct sockaddr_in a = loopback(port);
  if (s < 0) die("socket");
  setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  if (connect(s, (void *)&a, sizeof a) && errno != EINPROGRESS) die("connect");
  struct epoll_event e = {.events = EPOLLOUT, .data.u32 = i};
  epoll_ctl(ep, EPOLL_CTL_ADD, s, &e);
  return s;
}
static int burst(int port, int conns, double seconds) {
  int *s = malloc(conns * sizeof *s), ep = epoll_create1(0);
  long n = 0, failed = 0;
  for (int i = 0; i < conns; i++) s[i] = begin(port, ep, i);
  struct epoll_event ev[256];
  double t = now();
  while (now() - t < seconds) {
    int k = epoll_wait(ep, ev, 256, 1000);
    if (!k) { fprintf(stderr, "it stands still\n"); return 1; }
    for (int j = 0; j < k; j++) {
      int i = ev[j].data.u32;
      if (ev[j].events & EPOLLOUT && !(ev[j].events & (EPOLLERR | EPOLLHUP)) && send(s[i], buf, 1, MSG_NOSIGNAL) == 1) {
        struct epoll_event e = {.events = EPOLLIN, .data.u32 = i};
        epoll_ctl(ep, EPOLL_CTL_MOD, s[i], &e);
        continue;
      }
      if (recv(s[i], buf, 1, 0) == 1) n++; else failed++;
      close(s[i]);
      s[i] = begin(port, ep, i);
    }
  }
  printf("rate=%.0f failed=%ld\n", n / (now() - t), failed);
  return 0;
}

int main(int c, char **v) {
  signal(SIGPIPE, SIG_IGN);
  if (c == 2 && !strcmp(v[1], "echo")) serve(1);
  if (c == 2 && !strcmp(v[1], "sink")) serve(0);
  if (c < 3) { fprintf(stderr, "see the head of loadgen.c\n"); return 2; }
  int port = atoi(v[2]);
  if (!strcmp(v[1], "pp") && c == 6) return ping_pong(port, atoi(v[3]), atoi(v[4]), atof(v[5]));
  if (!strcmp(v[1], "bulk") && c == 4) return bulk(port, atol(v[3]));
  if (!strcmp(v[1], "conn") && c == 4) return connects(port, atof(v[3]));
  if (!strcmp(v[1], "burst") && c == 5) return burst(port, atoi(v[3]), atof(v[4]));
  return 2;
}

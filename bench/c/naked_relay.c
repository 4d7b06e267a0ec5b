/* The limit for any relay on one core: one epoll loop that receives and sends, without policy, counters or limits.
 *   naked_relay LISTENPORT TARGETPORT [busy]        busy: poll without sleeping
 * What the far end does not take at once is waited for: this is a yardstick, not a proxy. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define MOST 65536 /* descriptors */

static int reverse[MOST]; /* descriptor -> the session's other one */
static char buffer[65536];
static const int one = 1;

static struct sockaddr_in loopback(int port) {
  struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  return a;
}

static void watch(int epoll, int fd) {
  struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
  epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
}

static void begin(int epoll, int listener, struct sockaddr_in target) {
  int down = accept(listener, 0, 0), up = socket(AF_INET, SOCK_STREAM, 0);
  if (down < 0 || up < 0 || down >= MOST || up >= MOST || connect(up, (void *)&target, sizeof target)) {
    if (down >= 0) close(down);
    if (up >= 0) close(up);
    return;
  }
  setsockopt(down, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  setsockopt(up, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  reverse[down] = up;
  reverse[up] = down;
  watch(epoll, down);
  watch(epoll, up);
}

/* 0: the session has ended, and both descriptors are closed. */
static int forward(int fd) {
  ssize_t received = recv(fd, buffer, sizeof buffer, MSG_DONTWAIT);
  if (received < 0 && errno == EAGAIN) return 1;
  if (received <= 0) {
    close(fd);
    close(reverse[fd]);
    return 0;
  }
  for (ssize_t sent = 0, more; sent < received; sent += more) {
    more = send(reverse[fd], buffer + sent, received - sent, MSG_NOSIGNAL);
    if (more <= 0) break;
  }
  return 1;
}

int main(int count, char **words) {
  if (count < 3) return 2;
  int listener = socket(AF_INET, SOCK_STREAM, 0), epoll = epoll_create1(0), timeout = count > 3 ? 0 : -1;
  struct sockaddr_in here = loopback(atoi(words[1])), target = loopback(atoi(words[2]));
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  if (bind(listener, (void *)&here, sizeof here) || listen(listener, 4096)) {
    perror("bind");
    return 1;
  }
  watch(epoll, listener);
  struct epoll_event events[256];
  for (;;) {
    int ready = epoll_wait(epoll, events, 256, timeout);
    for (int i = 0; i < ready; i++) {
      int fd = events[i].data.fd;
      if (fd == listener) {
        begin(epoll, listener, target);
      } else if (fd >= 0 && !forward(fd)) { /* its other end may be among those that are ready: closed, too */
        for (int j = i + 1; j < ready; j++)
          if (events[j].data.fd == reverse[fd]) events[j].data.fd = -1;
      }
    }
  }
}

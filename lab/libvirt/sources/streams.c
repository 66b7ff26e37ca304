/* streams COMMAND...: packets at a steady rate in both directions, any number of streams in one process. The same program
 * is at both ends. Each packet says what its sender has received so far, so one end's log tells both directions; see
 * lab/libvirt/streams.py. Commands are the arguments first, then the lines of stdin; it ends with stdin.
 *
 *   accept PORT                             let streams come, TCP and UDP, on all addresses that this end has now
 *   stream NUMBER tcp|udp ADDRESS PORT RATE begin one of RATE packets a second; the other end answers at the same rate
 *   log FILE                                append a struct arrival for every packet received
 *   say WORDS                               print a line
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define STREAMS 64
#define MILLISECOND 1000000
/* What was not sent in a stall is not made up for beyond this, else a stall would be followed by a flood. */
#define BACKLOG_US 250000
#define FLUSH_US 20000
#define WINDOW 4096   /* numbers below the highest for which a duplicate is known from a late packet */
#define SEND_BUFFER (4 << 20)

struct packet {
    uint64_t sequence;   /* from 1 */
    uint64_t sent_us;    /* by the sender's clock, as is arrived_us */
    uint64_t arrived_us; /* when the last packet came to the sender, 0: none yet */
    uint64_t highest;    /* sequence that came to the sender */
    uint64_t received;   /* packets that came to the sender, duplicates among them */
    uint64_t duplicates;
    uint32_t stream, rate;
};

struct arrival {
    uint64_t at_us;
    struct packet packet;
};

struct stream {
    int fd, is_udp;
    size_t have, left;   /* TCP: bytes of `in` that came, bytes of `going` that still have to go */
    uint64_t began_us, skipped;
    struct packet in, out, going;
    uint8_t seen[WINDOW];
};

enum kind { STDIN, TIMER, TCP_LISTENER, UDP_LISTENER, STREAM };

static struct stream *streams[STREAMS];
static int stream_count, epoll_fd;
static uint64_t now_us, flushed_us;
static FILE *log_file;

static void look_at_clock(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    now_us = now.tv_sec * 1000000ULL + now.tv_nsec / 1000;
}

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static void watch(int fd, enum kind kind, uint32_t value)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = (uint64_t)kind << 32 | value};

    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event))
        fail("epoll_ctl");
}

static struct stream *add_stream(int fd, int is_udp)
{
    struct stream *stream = calloc(1, sizeof *stream);
    int one = 1, size = SEND_BUFFER;

    if (!stream || stream_count == STREAMS) {
        fputs("streams: no room for another stream\n", stderr);
        exit(1);
    }
    fcntl(fd, F_SETFL, O_NONBLOCK);
    if (!is_udp) {
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size);
    }
    stream->fd = fd;
    stream->is_udp = is_udp;
    watch(fd, STREAM, stream_count);
    return streams[stream_count++] = stream;
}

static void begin_sending(struct stream *stream, uint32_t number, uint32_t rate)
{
    stream->out.stream = number;
    stream->out.rate = rate;
    stream->began_us = now_us;
}

static void take(struct stream *stream, const struct packet *packet)
{
    struct packet *out = &stream->out;
    struct arrival arrival = {now_us, *packet};

    if (log_file)
        fwrite(&arrival, sizeof arrival, 1, log_file);
    if (!out->rate)
        begin_sending(stream, packet->stream, packet->rate);
    for (uint64_t skipped = out->highest + 1; skipped < packet->sequence && skipped <= out->highest + WINDOW; skipped++)
        stream->seen[skipped % WINDOW] = 0;
    if (packet->sequence > out->highest) {
        out->highest = packet->sequence;
        stream->seen[packet->sequence % WINDOW] = 1;
    } else if (packet->sequence + WINDOW > out->highest && !stream->seen[packet->sequence % WINDOW]) {
        stream->seen[packet->sequence % WINDOW] = 1;
    } else {
        out->duplicates++;
    }
    out->received++;
    out->arrived_us = now_us;
}

static void receive(struct stream *stream)
{
    char *into = (char *)&stream->in;

    for (;;) {
        ssize_t size = recv(stream->fd, into + stream->have, sizeof stream->in - stream->have, 0);

        look_at_clock();
        if (size <= 0) {
            if (!stream->is_udp && (size == 0 || (errno != EAGAIN && errno != EINTR))) {
                epoll_ctl(epoll_fd, EPOLL_CTL_DEL, stream->fd, NULL);   /* ended for good: the log's silence says it */
                stream->out.rate = 0;
            }
            return;
        }
        stream->have += size;
        if (stream->have == sizeof stream->in) {
            take(stream, &stream->in);
            stream->have = 0;
        } else if (stream->is_udp) {
            stream->have = 0;   /* not one of ours */
        }
    }
}

/* Returns 0 when the kernel takes no more now. */
static int send_packet(struct stream *stream)
{
    struct packet *out = &stream->out, *going = &stream->going;

    if (!stream->left) {
        look_at_clock();
        *going = *out;
        going->sequence++;
        going->sent_us = now_us;
        stream->left = sizeof *going;
    }
    ssize_t size = send(stream->fd, (char *)(going + 1) - stream->left, stream->left, MSG_NOSIGNAL);
    if (size < 0) {
        if (stream->left == sizeof *going)
            stream->left = 0;   /* nothing of it went: its number is free */
        return 0;
    }
    if (stream->left == sizeof *going)
        out->sequence++;
    stream->left -= size;
    return stream->left == 0;
}

static void send_what_is_due(struct stream *stream)
{
    uint64_t rate = stream->out.rate, backlog = rate * BACKLOG_US / 1000000;
    uint64_t due = (now_us - stream->began_us) * rate / 1000000 - stream->out.sequence - stream->skipped;

    if (!rate)
        return;
    if (due > backlog) {
        stream->skipped += due - backlog;
        due = backlog;
    }
    while (due && send_packet(stream))
        due--;
}

static int listen_on(const struct sockaddr *address, socklen_t size, int kind)
{
    int fd = socket(address->sa_family, kind, 0), one = 1, zero = 0;

    if (fd < 0)
        fail("socket");
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (kind == SOCK_STREAM)
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &zero, sizeof zero);
    if (bind(fd, address, size))
        fail("bind");
    return fd;
}

static void accept_streams(int port)
{
    struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
    struct ifaddrs *all, *each;
    int fd = listen_on((struct sockaddr *)&any, sizeof any, SOCK_STREAM);

    if (listen(fd, STREAMS) || getifaddrs(&all))
        fail("listen");
    watch(fd, TCP_LISTENER, fd);
    /* One socket for each address, so that the answer comes from the address that was asked. */
    for (each = all; each; each = each->ifa_next) {
        struct sockaddr_in *v4 = (struct sockaddr_in *)each->ifa_addr;
        struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)each->ifa_addr;

        if (v4 && v4->sin_family == AF_INET) {
            v4->sin_port = htons(port);
            fd = listen_on(each->ifa_addr, sizeof *v4, SOCK_DGRAM);
        } else if (v6 && v6->sin6_family == AF_INET6 && !IN6_IS_ADDR_LINKLOCAL(&v6->sin6_addr)) {
            v6->sin6_port = htons(port);
            fd = listen_on(each->ifa_addr, sizeof *v6, SOCK_DGRAM);
        } else {
            continue;
        }
        fcntl(fd, F_SETFL, O_NONBLOCK);
        watch(fd, UDP_LISTENER, fd);
    }
    freeifaddrs(all);
}

static void welcome_udp(int listener)
{
    struct sockaddr_storage here, there;
    struct packet packet;
    socklen_t here_size = sizeof here, there_size = sizeof there;
    ssize_t size = recvfrom(listener, &packet, sizeof packet, 0, (struct sockaddr *)&there, &there_size);

    if (size != sizeof packet)
        return;
    for (int i = 0; i < stream_count; i++)   /* it came before the stream's own socket was there */
        if (streams[i]->is_udp && streams[i]->out.stream == packet.stream) {
            take(streams[i], &packet);
            return;
        }
    getsockname(listener, (struct sockaddr *)&here, &here_size);
    int fd = listen_on((struct sockaddr *)&here, here_size, SOCK_DGRAM);
    if (connect(fd, (struct sockaddr *)&there, there_size))
        fail("connect");
    take(add_stream(fd, 1), &packet);
}

static void begin_stream(unsigned number, int is_udp, const char *address, int port, unsigned rate)
{
    struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons(port)};
    struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
    int is_v4 = inet_pton(AF_INET, address, &v4.sin_addr) == 1;
    int fd = socket(is_v4 ? AF_INET : AF_INET6, (is_udp ? SOCK_DGRAM : SOCK_STREAM) | SOCK_NONBLOCK, 0);

    inet_pton(AF_INET6, address, &v6.sin6_addr);
    if (fd < 0 || (connect(fd, is_v4 ? (void *)&v4 : (void *)&v6, is_v4 ? sizeof v4 : sizeof v6) && errno != EINPROGRESS))
        fail(address);
    begin_sending(add_stream(fd, is_udp), number, rate);
}

static void obey(const char *command)
{
    unsigned number, rate;
    int port;
    char protocol[4], address[64];

    if (sscanf(command, "accept %d", &port) == 1) {
        accept_streams(port);
    } else if (sscanf(command, "stream %u %3s %63s %d %u", &number, protocol, address, &port, &rate) == 5) {
        begin_stream(number, !strcmp(protocol, "udp"), address, port, rate);
    } else if (!strncmp(command, "log ", 4)) {
        log_file = fopen(command + 4, "a");
        if (!log_file)
            fail(command + 4);
    } else if (!strncmp(command, "say ", 4)) {
        puts(command + 4);
        fflush(stdout);
    } else {
        fprintf(stderr, "streams: what is \"%s\"?\n", command);
        exit(1);
    }
}

static void obey_stdin(void)
{
    static char text[4096];
    static size_t have;
    ssize_t size = read(STDIN_FILENO, text + have, sizeof text - have - 1);
    char *line = text, *end;

    if (size <= 0)
        exit(0);
    have += size;
    text[have] = 0;
    for (; (end = strchr(line, '\n')); line = end + 1) {
        *end = 0;
        obey(line);
    }
    have = text + have - line;
    memmove(text, line, have);
}

static void tick(int timer)
{
    uint64_t expirations;

    if (read(timer, &expirations, sizeof expirations) < 0)
        return;
    for (int i = 0; i < stream_count; i++)
        send_what_is_due(streams[i]);
    if (log_file && now_us - flushed_us > FLUSH_US) {
        fflush(log_file);
        flushed_us = now_us;
    }
}

int main(int argc, char **argv)
{
    struct itimerspec every = {{0, MILLISECOND}, {0, MILLISECOND}};
    struct epoll_event events[STREAMS];
    int timer = timerfd_create(CLOCK_MONOTONIC, 0);

    epoll_fd = epoll_create1(0);
    timerfd_settime(timer, 0, &every, NULL);
    watch(STDIN_FILENO, STDIN, 0);
    watch(timer, TIMER, timer);
    look_at_clock();
    for (int i = 1; i < argc; i++)
        obey(argv[i]);
    for (;;) {
        int count = epoll_wait(epoll_fd, events, STREAMS, -1);

        look_at_clock();
        for (int i = 0; i < count; i++) {
            uint32_t value = events[i].data.u64;

            switch (events[i].data.u64 >> 32) {
            case STDIN:
                obey_stdin();
                break;
            case TIMER:
                tick(value);
                break;
            case TCP_LISTENER: {
                int fd = accept(value, NULL, NULL);
                if (fd >= 0)
                    add_stream(fd, 0);
                break;
            }
            case UDP_LISTENER:
                welcome_udp(value);
                break;
            case STREAM:
                receive(streams[value]);
            }
        }
    }
}

/* enter PID COMMAND...: run a command in the mount, network, uts and pid namespaces of a process. As nsenter does, but to
 * its starter it is as if it were the command: signals are passed on, it ends as the command did, and if it is killed the
 * command is killed too. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/pidfd.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

static const int passed_on[] = {SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
static const char *const namespaces[] = {"net", "uts", "pid", "mnt"};   /* mnt last: /proc is another one then */
static pid_t child;

static void pass_on(int number)
{
    kill(child, number);
}

static void fail(const char *what)
{
    perror(what);
    exit(125);
}

int main(int argc, char **argv)
{
    char path[64];
    struct pollfd self = {.fd = pidfd_open(getpid(), 0), .events = POLLIN};
    int status, fd;

    if (argc < 3) {
        fputs("use: enter PID COMMAND...\n", stderr);
        return 125;
    }
    if (self.fd < 0)
        fail("pidfd_open");
    for (size_t i = 0; i < sizeof namespaces / sizeof *namespaces; i++) {
        snprintf(path, sizeof path, "/proc/%d/ns/%s", atoi(argv[1]), namespaces[i]);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || setns(fd, 0))
            fail(path);
    }
    child = fork();   /* a pid namespace is for children */
    if (child < 0)
        fail("fork");
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (poll(&self, 1, 0) != 0)   /* killed before the line above: nobody tells */
            _exit(125);
        execvp(argv[2], argv + 2);
        perror(argv[2]);
        _exit(127);
    }
    for (size_t i = 0; i < sizeof passed_on / sizeof *passed_on; i++)
        signal(passed_on[i], pass_on);
    while (waitpid(child, &status, 0) < 0)
        ;
    if (WIFSIGNALED(status)) {
        signal(WTERMSIG(status), SIG_DFL);
        raise(WTERMSIG(status));
    }
    return WEXITSTATUS(status);
}

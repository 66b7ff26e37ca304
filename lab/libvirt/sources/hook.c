/* The lab's libvirt hook: hook GUEST OPERATION SUB-OPERATION EXTRA, the domain's XML on stdin. Appends
 * "CLOCK_MONOTONIC-seconds guest operation sub-operation" to JOURNAL, which lab/libvirt/journal.py reads, and refuses
 * the operation where VETO.OPERATION exists. In C because libvirt waits for it four times in each migration.
 * It prints nothing on stdout: for `migrate begin` that would replace the domain's XML. */
#include <fcntl.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#define JOURNAL "/run/lab/hooks"
#define VETO "/run/lab/veto"
#define REFUSED 3

int main(int argc, char **argv)
{
    char line[512], rest[4096];
    struct timespec now;
    int journal = open(JOURNAL, O_WRONLY | O_APPEND | O_CREAT, 0644);

    if (argc < 4)
        return 0;
    clock_gettime(CLOCK_MONOTONIC, &now);
    int size = snprintf(line, sizeof line, "%lld.%06ld %s %s %s\n", (long long)now.tv_sec, now.tv_nsec / 1000,
                argv[1], argv[2], argv[3]);
    if (journal < 0 || write(journal, line, size) != size)
        perror(JOURNAL);
    while (read(STDIN_FILENO, rest, sizeof rest) > 0)
        ;
    snprintf(line, sizeof line, "%s.%s", VETO, argv[2]);
    if (access(line, F_OK) == 0) {
        fputs("refused by the lab's hook\n", stderr);
        return REFUSED;
    }
    return 0;
}

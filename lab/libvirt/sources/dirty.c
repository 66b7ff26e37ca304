/* dirty MIB: write to that much memory for ever and check that every page still holds what was written last. A page that
 * does not is shouted about on the console: a migration lost it. lab/libvirt/guest.py looks for the word. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define PAGE 4096
#define WORDS (PAGE / sizeof(uint64_t))
#define SHOUTS 20

int main(int argc, char **argv)
{
    uint64_t pages = (argc > 1 ? strtoull(argv[1], NULL, 10) : 16) << 8;
    volatile uint64_t *memory = calloc(pages, PAGE);
    uint64_t bad = 0;

    if (!memory) {
        perror("dirty");
        return 1;
    }
    for (uint64_t pass = 0;; pass++)
        for (uint64_t page = 0; page < pages; page++) {
            volatile uint64_t *word = memory + page * WORDS + page % WORDS;

            if (*word != (pass ? pass << 32 | page : 0) && bad++ < SHOUTS) {
                printf("CORRUPT page %llu pass %llu holds %llx\n", (unsigned long long)page,
                       (unsigned long long)pass, (unsigned long long)*word);
                fflush(stdout);
            }
            *word = (pass + 1) << 32 | page;
        }
}

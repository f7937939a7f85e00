/* Calls the C code of deploy/cpu/ on an emulated ARM CPU, for arm.py. All integers have 64 bits.
 *
 *   request   operation, number of blocks, number of links; the size of each block; its bytes; links: block, offset,
 *             block, offset, for an address at the first place of the second one
 *   reply     what the call returned; the bytes of all blocks
 *
 * The first block holds the arguments. Each ends where a page begins that cannot be touched.
 *
 * Operations below 0 ask: -1 whether there is an int8 product, whose name the first block gets, and -2 - k whether
 * there is attention of kind k.
 */

#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE 65536 /* of any Linux on ARM */
#define MOST 64

int errata_call(int64_t operation, const void *arguments);
int errata_has_int8_product(void);
const char *errata_int8_product_name(void);
int errata_has_attention(int kind);

typedef struct {
    int64_t size, mapped;
    char *start, *bytes;
} Block;

static void take(void *to, int64_t size)
{
    if (fread(to, 1, (size_t)size, stdin) != (size_t)size)
        exit(feof(stdin) ? 0 : 3);
}

static Block block_of(int64_t size)
{
    Block block = { .size = size, .mapped = (size + 2 * PAGE - 1) / PAGE * PAGE };
    block.start = mmap(NULL, (size_t)block.mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (block.start == MAP_FAILED || mprotect(block.start + block.mapped - PAGE, PAGE, PROT_NONE) != 0)
        exit(4);
    block.bytes = block.start + (block.mapped - PAGE - size) / 4 * 4;
    return block;
}

static int64_t called(int64_t operation, const Block *arguments)
{
    if (operation >= 0)
        return errata_call(operation, arguments->bytes);
    if (operation < -1)
        return errata_has_attention((int)(-2 - operation));
    strncpy(arguments->bytes, errata_int8_product_name(), (size_t)arguments->size - 1);
    return errata_has_int8_product();
}

int main(void)
{
    for (;;) {
        int64_t head[3], sizes[MOST], link[4];
        Block blocks[MOST];
        take(head, sizeof head);
        if (head[1] > MOST)
            return 2;
        take(sizes, head[1] * 8);
        for (int64_t b = 0; b < head[1]; b++)
            blocks[b] = block_of(sizes[b]);
        for (int64_t b = 0; b < head[1]; b++)
            take(blocks[b].bytes, sizes[b]);
        for (int64_t l = 0; l < head[2]; l++) {
            take(link, sizeof link);
            char *address = blocks[link[2]].bytes + link[3];
            memcpy(blocks[link[0]].bytes + link[1], &address, sizeof address);
        }
        int64_t result = called(head[0], blocks);
        fwrite(&result, sizeof result, 1, stdout);
        for (int64_t b = 0; b < head[1]; b++) {
            fwrite(blocks[b].bytes, 1, (size_t)sizes[b], stdout);
            munmap(blocks[b].start, (size_t)blocks[b].mapped);
        }
        fflush(stdout);
    }
}

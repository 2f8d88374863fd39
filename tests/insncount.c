/* insncount: counts the guest instructions that qemu-user executes, whole programs or one function; tests/bench-arm builds and reads it.
 * A TCG plugin (interface version 1: QEMU 7.2's dynamic qemu-user has it, static ones do not):
 *   gcc -O2 -shared -fPIC -o insncount.so insncount.c
 *   qemu-aarch64 -plugin ./insncount.so[,cls=on][,from=ADDR,to=ADDR][,blocks=FILE] ./program
 * At exit, on stderr: all instructions, instructions per thread, and with cls=on classes by opcode word (AdvSIMD, loads and stores,
 * branches, integer). from=/to= (hexadecimal guest addresses) count only instructions that lie in [from,to). blocks= writes a line
 * "ADDRESS INSTRUCTIONS" for every translated block: the profile by function, once the addresses are looked up.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
/* The part of QEMU's plugin interface that is used here (version 1, as in QEMU 7.2), declared by hand. */
typedef uint64_t qemu_plugin_id_t;
typedef struct qemu_info_t qemu_info_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
enum qemu_plugin_cb_flags { QEMU_PLUGIN_CB_NO_REGS };
#define QEMU_PLUGIN_EXPORT __attribute__((visibility("default")))
#define QEMU_PLUGIN_VERSION 1
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *, void (*)(unsigned int, void *), enum qemu_plugin_cb_flags, void *);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, void *), void *);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);

QEMU_PLUGIN_EXPORT int qemu_plugin_version = QEMU_PLUGIN_VERSION;

#define MAXV 64
enum { SIMD, LDST, BR, INT, OTHER, NC };
static const char *cn[NC] = { "simd/fp", "load/store", "branch/sys", "integer", "other" };
typedef struct tbinfo { uint32_t n; uint32_t c[NC]; uint64_t at, runs; struct tbinfo *next; } tbinfo;
static struct { uint64_t n, c[NC]; char pad[64]; } cnt[MAXV];
static uint64_t from, to = UINT64_MAX;
static int cls;
static const char *blocks;
static tbinfo *all;

static int classify(uint32_t w)            /* A64 main encoding table, op0 = bits 28:25 */
{
    unsigned op0 = (w >> 25) & 15;
    if ((op0 & 7) == 7) return SIMD;
    if ((op0 & 5) == 4) return LDST;
    if ((op0 & 14) == 10) return BR;
    if ((op0 & 14) == 8 || (op0 & 7) == 5) return INT;
    return OTHER;
}

static void on_tb(unsigned int v, void *p)
{
    tbinfo *t = p;
    v &= MAXV - 1;
    t->runs++;                              /* not atomic: exact with one thread */
    cnt[v].n += t->n;
    if (cls) for (int i = 0; i < NC; i++) cnt[v].c[i] += t->c[i];
}

static void trans(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
    size_t k = qemu_plugin_tb_n_insns(tb);
    tbinfo t; memset(&t, 0, sizeof t);
    for (size_t i = 0; i < k; i++) {
        struct qemu_plugin_insn *in = qemu_plugin_tb_get_insn(tb, i);
        uint64_t a = qemu_plugin_insn_vaddr(in);
        if (a < from || a >= to) continue;
        if (!t.n++) t.at = a;
        if (cls) {
            uint32_t w;
            memcpy(&w, qemu_plugin_insn_data(in), 4);
            t.c[classify(w)]++;
        }
    }
    if (t.n) {
        tbinfo *p = malloc(sizeof *p); *p = t;   /* kept as long as the process, TBs may be flushed */
        p->next = all; all = p;                  /* translation runs under QEMU's own lock */
        qemu_plugin_register_vcpu_tb_exec_cb(tb, on_tb, QEMU_PLUGIN_CB_NO_REGS, p);
    }
}

static void fini(qemu_plugin_id_t id, void *p)
{
    uint64_t n = 0, c[NC] = { 0 };
    for (int v = 0; v < MAXV; v++) {
        n += cnt[v].n;
        for (int i = 0; i < NC; i++) c[i] += cnt[v].c[i];
    }
    fprintf(stderr, "insns: %" PRIu64 "\n", n);
    for (int v = 0; v < MAXV; v++)
        if (cnt[v].n && cnt[v].n != n) fprintf(stderr, "insns thread %d: %" PRIu64 "\n", v, cnt[v].n);
    FILE *f = blocks ? fopen(blocks, "w") : NULL;
    if (f) {
        for (const tbinfo *t = all; t; t = t->next) if (t->runs) fprintf(f, "%" PRIx64 " %" PRIu64 "\n", t->at, t->runs * t->n);
        fclose(f);
    }
    if (cls) for (int i = 0; i < NC; i++) fprintf(stderr, "insns %s: %" PRIu64 "\n", cn[i], c[i]);
}

QEMU_PLUGIN_EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
    for (int i = 0; i < argc; i++) {
        if (!strncmp(argv[i], "from=", 5)) from = strtoull(argv[i] + 5, 0, 16);
        else if (!strncmp(argv[i], "to=", 3)) to = strtoull(argv[i] + 3, 0, 16);
        else if (!strncmp(argv[i], "blocks=", 7)) blocks = strdup(argv[i] + 7);
        else if (!strncmp(argv[i], "cls=", 4)) cls = argv[i][4] == 'o' && argv[i][5] == 'n';
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, trans);
    qemu_plugin_register_atexit_cb(id, fini, NULL);
    return 0;
}

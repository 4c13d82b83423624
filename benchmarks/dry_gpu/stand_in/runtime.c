/* The CUDA runtime, cuBLAS and cuDNN of a GPU that is not there. In: calls of torch; out: success, and counts.

   Loaded before torch's libraries (LD_PRELOAD), so that these functions are found before the real ones. What torch
   wants and is not here, stubs.py makes: functions that only say "success". Three structs that torch reads come from
   the header of torch's own CUDA; other types that are only passed through are plain pointers here. */
#define _GNU_SOURCE /* RTLD_DEFAULT */
#include "counts.h"
#include "device.h"

#include <dlfcn.h>
#include <driver_types.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SUCCESS 0
#define OUT_OF_MEMORY 2  /* cudaErrorMemoryAllocation: torch's allocator frees its cache and tries again */
#define NOT_SUPPORTED 801 /* cudaErrorNotSupported */

_Atomic long dry_launches, dry_triton_launches, dry_gemms, dry_cudnn_plans, dry_syncs, dry_copies_to_host,
    dry_copies_to_device, dry_mallocs, dry_graph_launches;

static void *new_handle(void) { return calloc(1, 256); } /* a stream, an event, a descriptor: only its address counts */
static int waited(void) { dry_syncs++; return SUCCESS; }

/* -- The device ------------------------------------------------------------------------------------------------- */

int cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, DEVICE_NAME);
    p->major = COMPUTE_MAJOR;
    p->minor = COMPUTE_MINOR;
    p->totalGlobalMem = MEMORY_BYTES;
    p->multiProcessorCount = MULTIPROCESSORS;
    p->warpSize = WARP;
    p->maxThreadsPerBlock = THREADS_PER_BLOCK;
    p->maxThreadsPerMultiProcessor = THREADS_PER_MULTIPROCESSOR;
    p->maxBlocksPerMultiProcessor = BLOCKS_PER_MULTIPROCESSOR;
    p->regsPerBlock = p->regsPerMultiprocessor = REGISTERS;
    p->sharedMemPerBlock = SHARED_PER_BLOCK;
    p->sharedMemPerBlockOptin = SHARED_PER_BLOCK_OPTIN;
    p->sharedMemPerMultiprocessor = SHARED_PER_MULTIPROCESSOR;
    p->l2CacheSize = L2_BYTES;
    p->memoryBusWidth = MEMORY_BUS_BITS;
    p->maxGridSize[0] = 2147483647; /* torch's kernels refuse launches beyond these */
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = THREADS_PER_BLOCK;
    p->maxThreadsDim[2] = 64;
    return SUCCESS;
}
int cuDeviceGetAttribute(int *value, int attribute, int device); /* driver.c: the same numbers mean the same */
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    return cuDeviceGetAttribute(value, attribute, device);
}
int cudaGetDeviceCount(int *count) { *count = 1; return SUCCESS; }
int cudaGetDevice(int *device) { *device = 0; return SUCCESS; }
int cudaDriverGetVersion(int *version) { *version = CUDA_VERSION_NUMBER; return SUCCESS; }
int cudaRuntimeGetVersion(int *version) { *version = CUDA_VERSION_NUMBER; return SUCCESS; }
int cudaDeviceGetPCIBusId(char *text, int length, int device) {
    snprintf(text, length, "0000:00:00.0");
    return SUCCESS;
}
int cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; return SUCCESS; }
int cudaDeviceGetDefaultMemPool(void **pool, int device) { *pool = NULL; return SUCCESS; }
const char *cudaGetErrorString(int error) {
    return error == OUT_OF_MEMORY ? "out of memory" : "an error of the dry GPU";
}
const char *cudaGetErrorName(int error) { return "DRY_GPU_ERROR"; }

/* -- Memory: addresses that are counted and never touched -------------------------------------------------------- */

#define FIRST_ADDRESS 0x700000000000ul /* no program has memory there: whoever touches it dies at once */
#define GRANULE (2ul << 20)            /* the runtime gives whole pages of 2 MiB */
#define MOST_BLOCKS 65536

typedef struct {
    unsigned long start, n_bytes; /* n_bytes = 0: free */
} Block;
typedef struct {
    Block blocks[MOST_BLOCKS];
    int n;
} Table;
static Table on_device, on_host; /* the second: host memory that counts as pinned */
static unsigned long next_address = FIRST_ADDRESS, used_bytes;

static Block *find(Table *table, const void *pointer) {
    unsigned long at = (unsigned long)pointer;
    for (Block *b = table->blocks; b < table->blocks + table->n; b++)
        if (at >= b->start && at < b->start + b->n_bytes) return b;
    return NULL;
}
static void remember(Table *table, void *pointer, unsigned long n_bytes) {
    Block *b = table->blocks;
    while (b < table->blocks + table->n && b->n_bytes) b++;
    if (b == table->blocks + MOST_BLOCKS) {
        fprintf(stderr, "dry GPU: more than %d blocks of memory\n", MOST_BLOCKS);
        abort();
    }
    if (b == table->blocks + table->n) table->n++;
    *b = (Block){(unsigned long)pointer, n_bytes};
}

int cudaMalloc(void **pointer, size_t n_bytes) {
    *pointer = NULL;
    if (used_bytes + n_bytes > USABLE_BYTES) return OUT_OF_MEMORY;
    *pointer = (void *)next_address;
    next_address += (n_bytes + GRANULE - 1) / GRANULE * GRANULE; /* an address is never given twice */
    used_bytes += n_bytes;
    remember(&on_device, *pointer, n_bytes);
    dry_mallocs++;
    return SUCCESS;
}
int cudaFree(void *pointer) {
    Block *b = find(&on_device, pointer);
    if (b != NULL) {
        used_bytes -= b->n_bytes;
        b->n_bytes = 0;
    }
    return SUCCESS;
}
int cudaMallocAsync(void **pointer, size_t n_bytes, void *stream) { return cudaMalloc(pointer, n_bytes); }
int cudaFreeAsync(void *pointer, void *stream) { return cudaFree(pointer); }
int cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
    *free_bytes = USABLE_BYTES - used_bytes;
    *total_bytes = MEMORY_BYTES;
    return SUCCESS;
}
int cudaHostAlloc(void **pointer, size_t n_bytes, unsigned flags) {
    *pointer = calloc(1, n_bytes ? n_bytes : 1);
    remember(&on_host, *pointer, n_bytes ? n_bytes : 1);
    return SUCCESS;
}
int cudaFreeHost(void *pointer) {
    Block *b = find(&on_host, pointer);
    if (b != NULL) b->n_bytes = 0;
    free(pointer);
    return SUCCESS;
}
int cudaHostGetDevicePointer(void **device, void *host, unsigned flags) { *device = host; return SUCCESS; }
/* Tensor.is_pinned() asks this. */
int cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *pointer) {
    memset(a, 0, sizeof *a);
    a->type = cudaMemoryTypeUnregistered;
    if (find(&on_device, pointer) != NULL) {
        a->type = cudaMemoryTypeDevice;
        a->devicePointer = (void *)pointer;
    } else if (find(&on_host, pointer) != NULL) {
        a->type = cudaMemoryTypeHost;
        a->hostPointer = a->devicePointer = (void *)pointer;
    }
    return SUCCESS;
}

/* -- Copies ------------------------------------------------------------------------------------------------------ */

/* There is nothing to read: no kernel has written. What is longer than a scalar reads as it was last sent to this
   address: DDP sends its list of buckets around and reads it back. Otherwise a short copy reads as integers 1, of the
   widest type that fits its length, so that a loop goes on that asks "is it finite?", "was it accepted?" or "how
   many?": a bool is then true, a float 0 or the smallest above it, and a count, by which the host allocates memory, is
   small. */
#define SCALAR_BYTES 8
#define SHORT_BYTES 4096 /* longer ones read 0 */
#define ECHO_BYTES 65536 /* longer ones are weights and batches: nobody decides anything by them */
#define ECHOES 256
static struct {
    const void *address;
    size_t n_bytes;
    void *sent;
} echoes[ECHOES]; /* the newest, in turn */

static void keep(const void *address, const void *sent, size_t n_bytes) {
    static int next;
    for (int i = 0; i < ECHOES; i++)
        if (echoes[i].address == address) echoes[i].address = NULL; /* overwritten */
    if (n_bytes <= SCALAR_BYTES || n_bytes > ECHO_BYTES) return;
    echoes[next].address = address;
    echoes[next].n_bytes = n_bytes;
    echoes[next].sent = realloc(echoes[next].sent, n_bytes);
    memcpy(echoes[next].sent, sent, n_bytes);
    next = (next + 1) % ECHOES;
}
static void read_back(void *to, const void *address, size_t n_bytes) {
    size_t width = n_bytes % 8 == 0 ? 8 : n_bytes % 4 == 0 ? 4 : 1;
    memset(to, 0, n_bytes);
    for (size_t i = 0; i < n_bytes && n_bytes <= SHORT_BYTES; i += width) ((char *)to)[i] = 1; /* little-endian */
    for (int i = 0; i < ECHOES; i++)
        if (echoes[i].address == address && echoes[i].n_bytes == n_bytes) memcpy(to, echoes[i].sent, n_bytes);
}
static int copy(void *to, const void *from, size_t n_bytes) {
    int to_device = find(&on_device, to) != NULL, from_device = find(&on_device, from) != NULL;
    if (to_device && !from_device) {
        dry_copies_to_device++;
        keep(to, from, n_bytes);
    } else if (!to_device && from_device) {
        dry_copies_to_host++;
        read_back(to, from, n_bytes);
    } else if (!to_device) {
        memcpy(to, from, n_bytes);
    }
    return SUCCESS;
}
int cudaMemcpyAsync(void *to, const void *from, size_t n_bytes, int kind, void *stream) {
    return copy(to, from, n_bytes);
}
int cudaMemcpy(void *to, const void *from, size_t n_bytes, int kind) {
    waited();
    return copy(to, from, n_bytes);
}

/* -- Streams, events, waiting ------------------------------------------------------------------------------------ */

int cudaStreamCreate(void **stream) { *stream = new_handle(); return SUCCESS; }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { return cudaStreamCreate(stream); }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return SUCCESS; }
int cudaStreamGetPriority(void *stream, int *priority) { *priority = 0; return SUCCESS; }
int cudaEventCreate(void **event) { *event = new_handle(); return SUCCESS; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return cudaEventCreate(event); }
/* Every kernel takes 1 ms: a benchmark of variants (Inductor's, Triton's) finds all alike and takes the first. */
int cudaEventElapsedTime(float *ms, void *start, void *end) { *ms = 1.0f; return SUCCESS; }
int cudaDeviceSynchronize(void) { return waited(); }
int cudaStreamSynchronize(void *stream) { return waited(); }
int cudaEventSynchronize(void *event) { return waited(); }
int cudaLaunchHostFunc(void *stream, void (*function)(void *), void *data) { function(data); return SUCCESS; }

/* -- Launches: nothing runs -------------------------------------------------------------------------------------- */

static int launched(void) { dry_launches++; return SUCCESS; }
int cudaLaunchKernel(void) { return launched(); }
int cudaLaunchKernelExC(void) { return launched(); }
int cudaLaunchCooperativeKernel(void) { return launched(); }
int __cudaLaunchKernel(void) { return launched(); } /* what <<<...>>> becomes in CUDA 13, with the three below */
int __cudaGetKernel(void **kernel, const void *function) { *kernel = (void *)function; return SUCCESS; }
int __cudaPushCallConfiguration(void) { return SUCCESS; }
int __cudaPopCallConfiguration(void) { return SUCCESS; }
int __cudaInitModule(void) { return SUCCESS; }
/* torch's softmax, sorts and attention size their grids by these two. */
int cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *function) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = THREADS_PER_BLOCK;
    a->numRegs = 32;
    a->ptxVersion = a->binaryVersion = 10 * COMPUTE_MAJOR + COMPUTE_MINOR;
    return SUCCESS;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *function, int threads, size_t shared) {
    *n = 2;
    return SUCCESS;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *function, int threads, size_t shared,
                                                           unsigned flags) {
    *n = 2;
    return SUCCESS;
}
int cudaGetSymbolAddress(void **pointer, const void *symbol) { *pointer = (void *)FIRST_ADDRESS; return SUCCESS; }

/* c10 takes the driver's functions from here: ours from driver.c, any other does nothing. */
static int nothing(void) { return SUCCESS; }
int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                     int *status) {
    void *found = dlsym(RTLD_DEFAULT, name);
    *function = found != NULL ? found : (void *)nothing;
    if (status != NULL) *status = SUCCESS;
    return SUCCESS;
}
int cudaIpcGetMemHandle(void) { return NOT_SUPPORTED; }

/* -- CUDA graphs: capturing is real for torch's allocator, the graph stays empty ---------------------------------- */

static int capturing; /* 1 = cudaStreamCaptureStatusActive */
static unsigned long long capture_id = 1;

int cudaStreamBeginCapture(void *stream, int mode) { capturing = 1; capture_id++; return SUCCESS; }
int cudaStreamEndCapture(void *stream, void **graph) { capturing = 0; *graph = new_handle(); return SUCCESS; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = capturing; return SUCCESS; }
int cudaStreamGetCaptureInfo(void *stream, int *status, unsigned long long *id, void **graph, void *dependencies,
                             void *edges, size_t *n_dependencies) {
    *status = capturing;
    if (id != NULL) *id = capture_id;
    if (graph != NULL) *graph = (void *)8;
    if (n_dependencies != NULL) *n_dependencies = 0;
    return SUCCESS;
}
int cudaGraphGetNodes(void *graph, void *nodes, size_t *n) { *n = 1; return SUCCESS; } /* torch warns of an empty one */
int cudaGraphInstantiateWithFlags(void **run, void *graph, unsigned long long flags) {
    *run = new_handle();
    return SUCCESS;
}
int cudaGraphLaunch(void *run, void *stream) { dry_graph_launches++; return SUCCESS; }

/* -- cuBLAS and cuDNN. Products by any name with "gemm" in it are counted by the stubs. --------------------------- */

int cublasCreate_v2(void **handle) { *handle = new_handle(); return SUCCESS; }
int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return SUCCESS; }
int cublasGetPointerMode_v2(void *handle, int *mode) { *mode = 0; return SUCCESS; }
size_t cublasLtGetVersion(void) { return 10 * CUDA_VERSION_NUMBER; }
int cublasLtMatmulDescCreate(void **made, int compute, int scale) { *made = new_handle(); return SUCCESS; }
int cublasLtMatmulPreferenceCreate(void **made) { *made = new_handle(); return SUCCESS; }
int cublasLtMatrixLayoutCreate(void **made, int type, size_t rows, size_t columns, long ld) {
    *made = new_handle();
    return SUCCESS;
}
#define HEURISTIC_RESULT_BYTES 96 /* sizeof(cublasLtMatmulHeuristicResult_t): zero is an algorithm without workspace */
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, void *results, int *n_found) {
    memset(results, 0, HEURISTIC_RESULT_BYTES);
    *n_found = 1; /* with none, torch raises CUBLAS_STATUS_NOT_SUPPORTED */
    return SUCCESS;
}
int cublasLtMatmul(void) { dry_gemms++; return SUCCESS; }

int cudnnCreate(void **handle) { *handle = new_handle(); return SUCCESS; }
int cudnnGetStream(void *handle, void **stream) { *stream = NULL; return SUCCESS; }
int cudnnBackendCreateDescriptor(int type, void **made) { *made = new_handle(); return SUCCESS; }
int cudnnBackendExecute(void) { dry_cudnn_plans++; return SUCCESS; }

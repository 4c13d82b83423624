/* The CUDA driver of a GPU that is not there. In: calls of Triton and torch; out: success, and counts of launches.

   Triton's launcher and torch's own (libcaffe2_nvrtc.so) open libcuda.so.1 and want these functions. A module or
   function is an address that nobody looks at. Each type that is only passed through is a plain pointer here. */
#include "counts.h"
#include "device.h"

#include <stdlib.h>

#define SUCCESS 0
#define NOT_FOUND 500 /* CUDA_ERROR_NOT_FOUND */
typedef unsigned long Address;

static void *const CONTEXT = (void *)8; /* any that is not NULL: the context counts as current */

static void *new_handle(void) { return malloc(8); }

/* -- The device and its context: asked for at the first kernel -------------------------------------------------- */

int cuInit(unsigned flags) { return SUCCESS; }
int cuDriverGetVersion(int *version) { *version = CUDA_VERSION_NUMBER; return SUCCESS; }
int cuDeviceGetCount(int *count) { *count = 1; return SUCCESS; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return SUCCESS; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = CONTEXT; return SUCCESS; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *active = 1; return SUCCESS; }
int cuCtxGetCurrent(void **context) { *context = CONTEXT; return SUCCESS; }
int cuCtxSetCurrent(void *context) { return SUCCESS; }
int cuCtxPushCurrent_v2(void *context) { return SUCCESS; }
int cuCtxPopCurrent_v2(void **context) { return SUCCESS; }
int cuCtxGetDevice(int *device) { *device = 0; return SUCCESS; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 0; return SUCCESS; }
int cuCtxSetLimit(int limit, size_t value) { return SUCCESS; }

/* Numbers of CUdevice_attribute in cuda.h; cudaDeviceAttr of the runtime has the same. */
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 1: *value = THREADS_PER_BLOCK; break;
    case 8: *value = SHARED_PER_BLOCK; break;
    case 10: *value = WARP; break;
    case 12: *value = REGISTERS; break; /* of a block; Triton computes its occupancy from it */
    case 13: *value = CLOCK_KHZ; break;
    case 16: *value = MULTIPROCESSORS; break;
    case 36: *value = MEMORY_CLOCK_KHZ; break; /* Triton's estimates of time want this and the next */
    case 37: *value = MEMORY_BUS_BITS; break;
    case 38: *value = L2_BYTES; break;
    case 39: *value = THREADS_PER_MULTIPROCESSOR; break;
    case 75: *value = COMPUTE_MAJOR; break;
    case 76: *value = COMPUTE_MINOR; break;
    case 81: *value = SHARED_PER_MULTIPROCESSOR; break;
    case 82: *value = REGISTERS; break; /* of a multiprocessor */
    case 97: *value = SHARED_PER_BLOCK_OPTIN; break;
    default: *value = 1; /* most others ask whether the card can do something */
    }
    return SUCCESS;
}

/* -- Loading what Triton compiled ------------------------------------------------------------------------------- */

int cuModuleLoad(void **module, const char *file) { *module = new_handle(); return SUCCESS; }
int cuModuleLoadData(void **module, const void *image) { *module = new_handle(); return SUCCESS; }
int cuModuleLoadDataEx(void **module, const void *image) { *module = new_handle(); return SUCCESS; }
int cuModuleUnload(void *module) { free(module); return SUCCESS; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = new_handle(); return SUCCESS; }
int cuLinkCreate_v2(void) { return SUCCESS; }
int cuLinkAddData_v2(void) { return SUCCESS; }
int cuLinkComplete(void) { return SUCCESS; }
int cuLinkDestroy(void) { return SUCCESS; }

/* Inductor reads registers and spills to choose between variants of a kernel: none spills here. */
int cuFuncGetAttribute(int *value, int attribute, void *function) {
    switch (attribute) {
    case 0: *value = THREADS_PER_BLOCK; break;
    case 4: *value = 64; break; /* registers of a thread: a usual number */
    default: *value = 0; /* static shared memory, and local memory, which is spills */
    }
    return SUCCESS;
}
int cuFuncSetAttribute(void *function, int attribute, int value) { return SUCCESS; }
int cuFuncSetCacheConfig(void *function, int config) { return SUCCESS; }

/* -- Launches: nothing runs ------------------------------------------------------------------------------------- */

static int launched(void) { dry_triton_launches++; return SUCCESS; }
int cuLaunchKernel(void) { return launched(); }            /* torch's launcher of Inductor's kernels */
int cuLaunchKernelEx(void) { return launched(); }          /* Triton's launcher */
int cuLaunchCooperativeKernel(void) { return launched(); }

int cuOccupancyMaxActiveClusters(int *n, void *function, void *config) { *n = 1; return SUCCESS; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, void *function, int threads, size_t shared) {
    *n = 2;
    return SUCCESS;
}
int cuTensorMapEncodeTiled(void) { return SUCCESS; }
int cuStreamGetCaptureInfo(void) { return SUCCESS; }
/* Triton's launcher asks for the device address of each tensor: it is the address itself. */
int cuPointerGetAttribute(void *value, int attribute, Address address) { *(Address *)value = address; return SUCCESS; }

/* -- Errors, and everything else -------------------------------------------------------------------------------- */

int cuGetErrorString(int error, const char **text) { *text = "an error of the dry GPU"; return SUCCESS; }
int cuGetErrorName(int error, const char **text) { *text = "DRY_GPU_ERROR"; return SUCCESS; }
/* Whoever looks functions up here (libnccl, the CUDA libraries) is told that there is none, and does without. */
int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long flags, int *status) {
    *function = NULL;
    return NOT_FOUND;
}

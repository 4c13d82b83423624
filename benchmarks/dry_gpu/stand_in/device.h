/* The card that we pretend: an H200, by NVIDIA's data sheet and CUDA's tables for compute capability 9.0. */
#ifndef DRY_DEVICE_H
#define DRY_DEVICE_H

#define DEVICE_NAME "NVIDIA H200"
#define COMPUTE_MAJOR 9
#define COMPUTE_MINOR 0
#define CUDA_VERSION_NUMBER 13000
#define MEMORY_BYTES 150754820096ul /* as a real one reports; torch shows 140.4 GiB */
#define USABLE_BYTES 150000000000ul /* the rest is the context's: more than this is out of memory */
#define MULTIPROCESSORS 132
#define WARP 32
#define THREADS_PER_BLOCK 1024
#define THREADS_PER_MULTIPROCESSOR 2048
#define BLOCKS_PER_MULTIPROCESSOR 32
#define REGISTERS 65536
#define SHARED_PER_BLOCK 49152             /* without asking for more */
#define SHARED_PER_BLOCK_OPTIN 232448      /* Triton rejects kernels that need more */
#define SHARED_PER_MULTIPROCESSOR 233472
#define L2_BYTES 62914560
#define CLOCK_KHZ 1980000
#define MEMORY_CLOCK_KHZ 3201000
#define MEMORY_BUS_BITS 6144

#endif

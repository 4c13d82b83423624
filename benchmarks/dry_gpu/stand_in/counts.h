/* What the stand-in counts. counts.py reads these numbers by their names. */
#ifndef DRY_COUNTS_H
#define DRY_COUNTS_H

extern _Atomic long dry_launches;        /* kernels of torch's own libraries */
extern _Atomic long dry_triton_launches; /* kernels that Triton and Inductor made */
extern _Atomic long dry_gemms;           /* matrix products handed to cuBLAS */
extern _Atomic long dry_cudnn_plans;     /* cuDNN plans executed */
extern _Atomic long dry_syncs;           /* calls in which the host waits for the device */
extern _Atomic long dry_copies_to_host;  /* copies from the device; the host waits for most of them too */
extern _Atomic long dry_copies_to_device;
extern _Atomic long dry_mallocs;         /* blocks that torch's allocator took from the device */
extern _Atomic long dry_graph_launches;  /* CUDA graphs replayed */

#endif

"""llama.cpp's server by its Python package. In: a GGUF file, port, slots, context of a slot, threads; out: it serves.

    python benchmarks/crowd/llama_server.py MODEL.gguf 8080 8 256 2

The same as `llama-server -m MODEL.gguf --port 8080 -np 8 -c 2048 -t 2` of its own program.
"""

import signal
import sys
import threading


def main() -> None:
    import xllamacpp

    path, port, slots, context, threads = sys.argv[1], *(int(word) for word in sys.argv[2:6])
    params = xllamacpp.CommonParams()
    params.model.path, params.port, params.n_parallel = path, port, slots
    params.n_ctx = slots * context
    params.verbosity, params.n_gpu_layers, params.cache_ram_mib = -1, 0, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    ended.wait()


if __name__ == "__main__":
    main()

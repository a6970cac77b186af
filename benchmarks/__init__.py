"""One script per question about speed; each prints its result as one line of JSON at the end.

    python -m benchmarks.engine        captions/s of the engine, compared with transformers' `generate`
    python -m benchmarks.step          what the scheduler itself costs per decode step
    python -m benchmarks.preprocess    images/s of image decoding, compared with transformers' image processor
    python -m benchmarks.pipeline      rows/s of the batch job, compared with Ray Data's `map_batches`
    python -m benchmarks.serve         cost of the endpoint, and captions/s compared with `@serve.batch`

`LOG.md` is the dated log of experiments, `results/` holds figures with their hardware.
"""

"""One script per question about speed; each prints its result as one line of JSON at the end.

    python -m benchmarks.engine        captions/s of the engine, compared with transformers' `generate`
    python -m benchmarks.step          time of the scheduler itself per decode step
    python -m benchmarks.preprocess    images/s of image decoding, compared with transformers' image processor
    python -m benchmarks.pipeline      rows/s of the batch job, compared with Ray Data's `map_batches`
    python -m benchmarks.growth        the batch job with 10^5 shards, in an object store, and on a huge tar
    python -m benchmarks.serve         cost of the endpoint, and captions/s compared with `@serve.batch`
    python -m benchmarks.reading       time and memory of the commands that read an output, by number of rows
    python -m benchmarks.startup       where a small job spends its time
    python -m benchmarks.behind        what callers and a job lose when they share an engine
    python -m benchmarks.confidence    how good the confidence of a caption is
    python -m benchmarks.quantized     images/s of a quantized engine, compared with a plain one
    python -m benchmarks.gpu           where the time of the engine goes on a GPU

`LOG.md` is the dated log of experiments; `results/` holds figures with their hardware.
"""

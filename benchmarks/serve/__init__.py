"""What the endpoint costs, and how it compares with `@serve.batch` around transformers' `generate`.

The endpoint is `blip2 serve` itself, with the front in Serve's proxy. The load is drawn scenes as PNG over
HTTP. Callers in a closed loop wait for their answer before they ask again. Arrivals at a rate (Poisson, with
a seed) wait for nobody, and their latency counts from the arrival, so that a slow side cannot hide its delay.
Callers, HTTP and image decoding use the same machine as the model. Nothing is answered from memory.

comparison
    Captions/s with a number of callers, and latency at 80 % of the rate at which `@serve.batch` is saturated.
    `@serve.batch` has its best batch size at each load, although one deployment has only one. Both sides have
    the same dtype and threads; one runs at a time, and the rounds alternate. `@serve.batch` has the defaults
    of Ray and torch, as users write it; with --passive its threads wait without spinning, as ours do.
start, rest
    Seconds from the command to the first 200 of /readyz; memory (PSS) and CPU time of all its processes while
    nobody asks.
streaming
    Time to the first piece of the text, next to the time to the whole answer.
overload
    Arrivals at five times the rate at which the endpoint is saturated.
without_model
    Requests/s for each core, with an engine that computes nothing: the cost of the path alone.

On a machine with other work, requests/s and latencies are noise. The CPU time of each part per request is
less so, while the parts are busy: `proxy_cpu_ms`, `gateway_cpu_ms`, `decoders_cpu_ms` and `model_cpu_ms`.

    python -m benchmarks.serve                         # the demonstration checkpoint, within five minutes
    python -m benchmarks.serve --only comparison --rounds 3
    python -m benchmarks.serve --model midsize --dtype bfloat16 --tokens 20 --images 160 --callers 1 16 64
"""

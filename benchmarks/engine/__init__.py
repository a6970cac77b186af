"""Images/s of the engine over transformers' `generate`, on the same weights, images and threads.

Almost all work for an image is matrix products. On the mid-size model the vision encoder has 46 of 67 GFLOP,
and both sides run it at the device's peak. An engine can only gain on the rest: prefill without padding,
decode steps over many slots instead of a batch that waits for its longest text, and one encoder pass for
several prompts. So the limit, by arithmetic, is printed next to each figure. "x of peak" compares the vision
encoder alone with a square matrix product (2048^3 on a CPU, 8192^3 on a GPU) that is timed alternately
with it.

Each side has its own process. On a CPU the rounds alternate, so that other work on the machine disturbs
both sides. A GPU has no other work: there the engine is timed first and ends before the reference is loaded,
so that the reference has all of the memory, and each figure is written to the JSON (`--output`) as soon as it
is known. The reference gets its best batch size, found in the same run, and prepared pixel values.

"agreement" is the fraction of texts whose tokens all equal the reference's. In bfloat16 it is low and means
little: the largest logits of a random model are nearly tied, the rounding of the two sides decides such ties
differently, and all tokens after the first difference differ too. In float32 it should be 1.

    python -m benchmarks.engine midsize-float32            # one case
    python -m benchmarks.engine --list
    python -m benchmarks.engine opt-2.7b --device cuda     # needs only torch and transformers
    python -m benchmarks.engine opt-2.7b --reference-batches 64 128 --skip-vision --output opt.json
"""

"""How each kind of shard is read. A reader is `read(work, options)`: tables, then a report.

No image is decoded here and no row is lost: where its bytes cannot be had, the row says why.
"""

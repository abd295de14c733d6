"""qcow2, versions 2 and 3.

header, entries, clusters, snapshots, bitmaps: bytes to objects and back (pure but for `read_*`).
l2, refcounts: the tables in memory; metadata: the order in which they reach the disk (the crash
rule); planning, writing: what a request changes; driver: reading, and the FormatDriver; loading:
opening.
"""

"""The data plane: inputs, keys, partitions, tables, shards. Needs neither torch nor Dask."""

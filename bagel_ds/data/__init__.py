"""What turns files into batches: index -> plan -> materialize -> PackedBatch."""

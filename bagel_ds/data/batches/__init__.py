"""From the plan to a rank's batches: read, decode, lay out, and send from worker processes.

Promises: a batch depends on its pack's plan and the seed only, never on workers, ranks or timing; closing the iterator
ends all workers. The room may import every other room of data but inspect, and model/batch.py. Begin with loader.py
(`PlannedData`): materialize.py makes a batch of a pack's plan, layout.py is the one builder of `PackedBatch`,
batch_workers.py and shared_batch.py run it in other processes.
"""

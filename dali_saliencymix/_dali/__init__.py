"""Implementation of `dali_saliencymix.fn`: Python operators on whole batches in a DALI graph, and the mixing nodes."""

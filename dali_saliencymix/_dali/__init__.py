"""What `dali_saliencymix.fn` puts into a DALI graph: Python operators on whole batches, and the mixing among them."""

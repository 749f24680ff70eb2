"""The Ray actors of a sweep, thin around parts that know no Ray.

`ModelServer` owns a slot, `ServerPool` hands slots to trials, and `LeasedModels` is a trial's side of both.
"""

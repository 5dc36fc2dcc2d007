"""Imported first by the fork server: what it imports next loads a fifth faster without garbage collection.
Its forks turn that on again: see forkserver.collect_garbage."""

import gc

gc.disable()

"""The engine beside its peers: one process run, equal inputs and threads, equal results before anything is timed."""

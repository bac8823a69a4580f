"""The GPU worker: claims jobs, admits models, runs the engine in a confined child, stores what comes back."""

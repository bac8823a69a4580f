"""Ask a server for curvature."""

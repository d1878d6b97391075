"""Running a network over slices: engines, tiles, and the pipeline that keeps them busy. Never formats."""

"""What `streaming.vision` imports."""


class VisionDataset:
    """A name to inherit from."""

"""A plug-in's module that fails while it is imported."""

raise RuntimeError("no such luck\nat all")

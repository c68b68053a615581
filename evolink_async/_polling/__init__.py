"""When and how tasks are polled. Knows the network only as ``fetch(ids)``."""

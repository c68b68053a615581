"""The command line, installed by the extra ``cli``."""

"""Tests of `evolink_async._results`."""

"""Tests of `evolink_async._cli`."""

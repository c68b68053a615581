"""Tests of `evolink_async.webhook`."""

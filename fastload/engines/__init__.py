"""Engines turn encoded bytes and a table of parameters into pixels. They draw nothing and decide nothing."""

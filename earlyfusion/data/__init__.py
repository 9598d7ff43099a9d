"""Rows of text and images -> documents -> a stream of any mixture -> packed batches.

    files -> tables -> rows -> forms -> encoding -> corpus -> mixture -> packing
             rows by number    turns    tokens      sources   documents  batches

`tokenize` writes the tokens of a corpus to `shards`, which `corpus` opens like rows. This
package does not know about losses or training loops.
"""

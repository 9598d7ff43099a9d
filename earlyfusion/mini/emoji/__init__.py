"""The emoji data: 11,437 openly licensed images with names in English and Korean.

`build` makes the folder from public npm packages, `dataset` reads it, `dialogues` turns it into
chat samples with images on both sides.
"""

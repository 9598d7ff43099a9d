"""Other people's corpora: rows of files -> documents -> a stream of any mixture, or token shards.

    files -> tables (rows by number) -> forms (a row's turns) -> encoding (tokens) -> mixture

`shards` keeps the tokens of a corpus on disk, and is read as rows are.
"""

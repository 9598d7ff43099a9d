"""Files of models: every layout is opened as a `Source`, and from there read, copied or described.
`open_*` looks at files without reading tensors, `load` and `assemble` read them into modules,
`save_*` writes modules, and `copy_to_*` writes an open checkpoint tensor by tensor."""

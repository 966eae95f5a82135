"""slicegpt-fast: slice transformer language models and run them on kernels made for their widths."""

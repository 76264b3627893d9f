"""GGUF files, which llama.cpp and all that is built on it load. `write.write_gguf` writes one."""

"""A page on which a model's image follows what is typed: `lcm_jax.app` serves it.

turns   who is next: one image at a time, of each visitor the newest request alone
asked   what a visitor asks for -> the request, and the command line that makes the same image
maker   the model of the page: compiles everything first, then makes images
guard   what the server answers at all: token, hosts, routes, sizes
layout  the page itself; the only module that imports Gradio
"""

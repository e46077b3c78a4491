"""What the controller and the workers cost, endure and gain; the figures are in ``bench/results``.

python -m bench compare                                  backends side by side: docs/benchmark.md
python -m bench overhead                                 what the controller adds
python -m bench cross-check                              our figures beside SGLang's own tool's
python -m bench plot FILES...                            pictures of results
python -m bench.soak --streams 1000 --requests 100000    every reply checked, memory watched
python -m bench.fuzz images --kind hf                    wrong pictures break nothing; or openapi
python bench/frontdoor/run.py --rounds 5                 beside other front doors, one harness
python bench/frontdoor/run.py --failures --fds tandem_openai
python bench/restart.py                                  a killed controller, whole again
python bench/cancel.py --kind hf                         a client leaves, the engine stops
python -m bench.tracing                                  what traces cost, on and off
python -m bench.hf                                       the Hugging Face worker's batch, memory
python -m bench.sglang                                   the SGLang worker's cost, gain, equality
python -m bench.random_weights DIR                       a checkpoint to measure without a download
"""

# Each target calls one tool; the tools can be called without make too.
#   sudo make demo [ARGS="--once --report target/demo.json"]
#   sudo make test [ARGS="--test differential"]
#   sudo make bench [ARGS="dataplane --quick"]
#   make fuzz [ARGS="600 decide"]

.PHONY: demo test bench lint fuzz setup

demo:
	@tools/demo $(ARGS)

test:
	@tools/test $(ARGS)

bench:
	@tools/bench $(ARGS)

lint:
	@tools/lint

fuzz:
	@tools/fuzz $(ARGS)

setup:
	@tools/setup

"""What tests of several folders share."""

pytest_plugins = ["tests.state.fixtures"]

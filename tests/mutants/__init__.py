"""Do the tests of what decides notice when it decides otherwise? Run it by ``scripts/test --mutants``.

Each module of ``modules.MODULES`` is changed in one place at a time (``changes``), and its own test files are run
against the change, in a process of its own (``trial``). A change that they let pass is *unnoticed*: a rule that nothing
states, or a piece of code that nothing needs.

What can be changed, and the changing, is cosmic-ray's. Its own runner is not used: it writes each change into the file
and starts Python and pytest anew, some 2 s each; a fork of one process that has them loaded, and is given the changed
text in place of the file, takes a quarter of that and touches no file.
"""

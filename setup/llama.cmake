# CMake includes this at llama.cpp's own `project()` line, inside the build of llama-cpp-python.

# The source package forces this on in the cache; only a plain variable, set here, gets past that. It is a third of the
# compile time, for a library that we do not use.
set(LLAMA_BUILD_COMMON OFF)

# gcc 12 drops the stores that fill AMX's tile configuration just before `ldtilecfg` reads it, and every quantized model
# then crashes on a CPU with AMX (ggml-org/llama.cpp#20824, #26954). Keep dead-store elimination away from that one file.
include(CheckCXXCompilerFlag)
check_cxx_compiler_flag("-fno-dse -fno-tree-dse" HAVE_NO_DSE)
if(HAVE_NO_DSE)
    cmake_language(DEFER CALL set_source_files_properties
        ${CMAKE_CURRENT_SOURCE_DIR}/ggml/src/ggml-cpu/amx/mmq.cpp
        TARGET_DIRECTORY ggml-cpu PROPERTIES COMPILE_OPTIONS "-fno-dse;-fno-tree-dse")
endif()

# Torch by its stable ABI: headers and libtorch_cpu, nothing else. `find_package(Torch)` would ask for all of CUDA.
find_package(Python REQUIRED COMPONENTS Interpreter)
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parent.as_posix(), torch.__version__, torch.version.hip or '', sep=';')"
  OUTPUT_VARIABLE torch_facts OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "latentkv builds against an installed torch: install torch>=2.10 first, then build with "
                      "`pip install --no-build-isolation`")
endif()
list(GET torch_facts 0 TORCH_DIR)
list(GET torch_facts 1 TORCH_VERSION)
list(GET torch_facts 2 TORCH_HIP)  # the ROCm version of a ROCm torch, else empty
if(TORCH_VERSION VERSION_LESS 2.10)
  message(FATAL_ERROR "latentkv needs torch >= 2.10, found ${TORCH_VERSION}")
endif()
message(STATUS "torch ${TORCH_VERSION} in ${TORCH_DIR}")

# What C++ must know of the ops comes from their descriptions in Python.
set(LATENTKV_GENERATED ${CMAKE_BINARY_DIR}/generated)
set(description ${PROJECT_SOURCE_DIR}/python/latentkv/ops/description.py)
add_custom_command(
  OUTPUT ${LATENTKV_GENERATED}/ops.h ${LATENTKV_GENERATED}/bound_ops.h
  COMMAND ${Python_EXECUTABLE} ${PROJECT_SOURCE_DIR}/cmake/generate_ops.py ${description} ${LATENTKV_GENERATED}
  DEPENDS ${description} ${PROJECT_SOURCE_DIR}/cmake/generate_ops.py
  COMMENT "generate ops.h")
add_custom_target(latentkv_ops DEPENDS ${LATENTKV_GENERATED}/ops.h)

# latentkv_library(<device> <common> [<architecture>...]): the library `_<device>` from LATENTKV_SOURCES in the folder
# <common>, which is csrc_common or a translated copy, to be compiled in the calling directory. It can tell the GPU
# architectures that it has code for.
function(latentkv_library device common)
  list(TRANSFORM LATENTKV_SOURCES PREPEND ${common}/)
  add_library(_${device} MODULE ${LATENTKV_SOURCES})
  set_target_properties(_${device} PROPERTIES PREFIX "" SUFFIX ".abi3.so")
  add_dependencies(_${device} latentkv_ops)
  target_include_directories(_${device} PRIVATE ${PROJECT_SOURCE_DIR}/csrc_${device} ${common} ${LATENTKV_GENERATED})
  target_include_directories(_${device} SYSTEM PRIVATE ${TORCH_DIR}/include)
  list(JOIN ARGN " " architectures)
  target_compile_definitions(_${device} PRIVATE TORCH_TARGET_VERSION=0x020A000000000000
                             LATENTKV_ARCHITECTURES="${architectures}")
  # By file name: the library is already loaded when ours is, so no search path is needed at run time.
  target_link_libraries(_${device} PRIVATE ${TORCH_DIR}/lib/libtorch_cpu.so)
  target_link_options(_${device} PRIVATE -Wl,--as-needed -Wl,--unresolved-symbols=ignore-in-shared-libs -s)
  set_target_properties(_${device} PROPERTIES SKIP_BUILD_RPATH ON)
  install(TARGETS _${device} LIBRARY DESTINATION latentkv)
endfunction()

# The current stream comes from torch's library for the GPU, which must be named among the libraries needed. A torch
# without it gets a stub of that name for the linker.
function(latentkv_link_torch_gpu device)
  set(library ${TORCH_DIR}/lib/libtorch_${device}.so)
  if(NOT EXISTS ${library})
    file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/stub.cpp "extern \"C\" __attribute__((visibility(\"default\"))) int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n")
    add_library(torch_${device} SHARED ${CMAKE_CURRENT_BINARY_DIR}/stub.cpp)
    set(library torch_${device})
  endif()
  target_link_libraries(_${device} PRIVATE ${library})
endfunction()

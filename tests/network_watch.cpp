// Preloaded into a command, refuses every socket to other machines and every look-up of a name, and writes a line about
// each to the file named by NETWORK_WATCH. Sockets of this machine's own (of its name service) are let through.
#include <dlfcn.h>
#include <netdb.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>

namespace {

void note(const char* call, const char* what) {
  std::FILE* file = std::fopen(std::getenv("NETWORK_WATCH"), "a");
  std::fprintf(file, "%s %s\n", call, what ? what : "");
  std::fclose(file);
}

}  // namespace

extern "C" int socket(int domain, int type, int protocol) noexcept {
  if (domain == AF_INET || domain == AF_INET6) {
    note("socket", domain == AF_INET ? "AF_INET" : "AF_INET6");
    errno = EACCES;
    return -1;
  }
  return reinterpret_cast<int (*)(int, int, int)>(dlsym(RTLD_NEXT, "socket"))(domain, type, protocol);
}

extern "C" int getaddrinfo(const char* node, const char*, const addrinfo*, addrinfo**) {
  note("getaddrinfo", node);
  return EAI_FAIL;
}
